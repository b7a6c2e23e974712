// Browsers start no worker from a file. Opened from disk, the site runs its search in a hidden frame instead.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.onmessage = null;
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.appendChild(this.frame);
      this.ready = new Promise((resolve) => { this.frame.onload = resolve; });
      window.addEventListener("message", (event) => {
        if (event.source !== this.frame.contentWindow) return;
        const message = new MessageEvent("message", { data: event.data });
        this.dispatchEvent(message);
        if (this.onmessage) this.onmessage(message);
      });
      const inside = this.frame.contentDocument;
      inside.open();
      inside.write(
        "<script>window.postMessage = (data) => parent.postMessage(data, '*');" +
        "window.importScripts = (...urls) => urls.forEach((u) => document.write('<script src=\"' + u + '\"><\\/script>'));" +
        "<\/script><script src=\"" + url + "\"><\/script>"
      );
      inside.close();
    }
    postMessage(data) {
      const copy = structuredClone(data); // as a real worker gets it
      this.ready.then(() => {
        const inside = this.frame.contentWindow;
        const message = new inside.MessageEvent("message", { data: copy });
        inside.dispatchEvent(message);
      });
    }
    terminate() { this.frame.remove(); }
  };
}
