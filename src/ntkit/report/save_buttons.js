  // Buttons that save: each figure as SVG and CSV, each table as LaTeX and CSV. They exist only with JavaScript.
  function save(name, type, text) {
    var link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: type }));
    link.download = name;
    link.click();
    setTimeout(function () { URL.revokeObjectURL(link.href); }, 1000);
  }
  function slug(text) {
    return text.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-+|-+$/g, "").slice(0, 60) || "ntkit";
  }
  function csv(rows) {
    return rows.map(function (row) {
      return row.map(function (cell) {
        var text = cell === null || cell === undefined ? "" : String(cell).replace(/\u2212/g, "-");  // numbers that programs read
        return /[",\r\n]/.test(text) ? '"' + text.replace(/"/g, '""') + '"' : text;
      }).join(",");
    }).join("\r\n") + "\r\n";
  }
  function words(markup) {  // plotly's names may hold tags such as <sub>
    return new DOMParser().parseFromString(markup || "", "text/html").body.textContent;
  }
  function numbers(figure) {  // one row per point of a curve, or per entry of a matrix
    var rows = [["panel", "curve", "x", "y", "error above", "error below", "value"]];
    Array.prototype.forEach.call(figure.querySelectorAll(".plot"), function (panel) {
      var head = panel.parentNode.querySelector("h4"), name = head ? head.textContent : "";
      plots[panel.id].data.forEach(function (trace) {
        if (trace.type === "heatmap") {
          trace.z.forEach(function (row, i) {
            row.forEach(function (value, j) {
              var said = Array.isArray(trace.customdata) ? words(trace.customdata[i][j]) : "";
              rows.push([name, said, trace.x ? trace.x[j] : j, trace.y ? trace.y[i] : i, "", "", value]);
            });
          });
          return;
        }
        if (trace.hoverinfo === "skip") { return; }  // labels and guide lines
        var error = trace.error_y || trace.error_x;
        trace.x.forEach(function (x, i) {
          var step = x === 0.5 && trace.customdata && trace.customdata[i] === 0 ? 0 : x;  // step 0 is drawn at 0.5
          var above = error ? error.array[i] : "", below = error && error.arrayminus ? error.arrayminus[i] : above;
          rows.push([name, words(trace.name), step, trace.y[i], above, below, ""]);
        });
      });
    });
    return csv(rows);
  }
  function cells(table) {  // small print stands in parentheses, but for that of a row's name
    return Array.prototype.map.call(table.querySelectorAll("tr"), function (row) {
      return Array.prototype.map.call(row.children, function (cell) {
        var copy = cell.cloneNode(true);
        Array.prototype.forEach.call(copy.querySelectorAll(".mark"), function (part) { part.remove(); });
        Array.prototype.forEach.call(copy.querySelectorAll("br"), function (part) { part.replaceWith("; "); });
        Array.prototype.forEach.call(copy.querySelectorAll(".under"), function (part) {
          var text = part.textContent.trim();
          if (text && cell.getAttribute("scope") !== "row") { part.replaceWith(" (" + text + ")"); } else { part.remove(); }
        });
        return copy.textContent.replace(/\u2060/g, "").replace(/\s+/g, " ").trim();
      });
    });
  }
  var marks = { "\u00b1": "$\\pm$", "\u2212": "$-$", "\u2192": "$\\to$", "\u2013": "--", "\u00d7": "$\\times$", "\u03bb": "$\\lambda$",
    "\u2080": "$_0$", "\u2081": "$_1$", "\u00b2": "$^2$", "\u2264": "$\\le$", "\u2265": "$\\ge$", "\u2713": "", "\u2717": "",
    "\u2019": "'", "\u201c": "``", "\u201d": "''", "\u2026": "\\ldots{}" };
  function tex(text) {
    return text.replace(/[\\&%$#_{}~^]/g, function (c) {
      return { "\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}" }[c] || "\\" + c;
    }).replace(/[^\x00-\x7f]/g, function (c) { return c in marks ? marks[c] : c; }).trim();
  }
  function latex(table, title) {
    var rows = cells(table), head = rows[0];
    var lines = rows.map(function (row) { return "  " + row.map(tex).join(" & ") + " \\\\"; });
    lines.splice(1, 0, "  \\midrule");
    return "% needs \\usepackage{booktabs}\n\\begin{table}\n  \\centering\n  \\caption{" + tex(title) + "}\n  \\begin{tabular}{l"
      + "r".repeat(Math.max(0, head.length - 1)) + "}\n  \\toprule\n" + lines.join("\n") + "\n  \\bottomrule\n  \\end{tabular}\n"
      + "\\end{table}\n";
  }
  function saver(place, text, title, work) {
    var made = document.createElement("button");
    made.type = "button"; made.textContent = text; made.title = title;
    made.setAttribute("aria-label", title);
    made.addEventListener("click", work);
    place.appendChild(made);
  }
  Array.prototype.forEach.call(document.querySelectorAll("figure"), function (figure) {
    var title = figure.querySelector("h3");
    if (!title || !figure.querySelector(".plot")) { return; }
    var name = slug(title.textContent), place = document.createElement("span");
    place.className = "save";
    saver(place, "SVG", "Save this figure as SVG", function () {
      var theme = root.dataset.theme, light = {};  // as for print, whatever the page shows
      root.dataset.theme = "light";
      Array.prototype.forEach.call(figure.querySelectorAll(".plot"), function (panel) {
        var plot = light[panel.id] = resolve(plots[panel.id], getComputedStyle(root));
        plot.data.forEach(function (trace) { trace.showlegend = Boolean(trace.name) && trace.hoverinfo !== "skip"; });
        plot.layout.showlegend = figure.querySelector(".legend") !== null;  // the page writes it beside the plot
        plot.layout.legend = { orientation: "h", y: 1.02, yanchor: "bottom" };
        plot.layout.margin = Object.assign({}, plot.layout.margin, plot.layout.showlegend ? { t: 60 } : {});
      });
      root.dataset.theme = theme;
      Array.prototype.forEach.call(figure.querySelectorAll(".plot"), function (panel, i, all) {
        Plotly.toImage(light[panel.id], { format: "svg", width: panel.clientWidth, height: panel.clientHeight }).then(function (uri) {
          var text = decodeURIComponent(uri.slice(uri.indexOf(",") + 1));
          save(name + (all.length > 1 ? "-" + (i + 1) : "") + ".svg", "image/svg+xml", text);
        });
      });
    });
    saver(place, "CSV", "Save the numbers of this figure as CSV", function () {
      save(name + ".csv", "text/csv", numbers(figure));
    });
    title.insertAdjacentElement("afterend", place);
  });
  Array.prototype.forEach.call(document.querySelectorAll("table"), function (table) {
    var box = table.closest("details"), region = table.closest("[aria-label]");
    var caption = table.querySelector("caption");
    var title = caption ? caption.textContent : box ? box.querySelector("summary").textContent
      : region ? region.getAttribute("aria-label") : document.title;
    var place = document.createElement("p");
    place.className = "save";
    saver(place, "LaTeX", "Save the table “" + title + "” as LaTeX", function () {
      save(slug(title) + ".tex", "text/x-tex", latex(table, title));
    });
    saver(place, "CSV", "Save the table “" + title + "” as CSV", function () {
      save(slug(title) + ".csv", "text/csv", csv(cells(table)));
    });
    (table.closest(".scroll") || table).insertAdjacentElement("afterend", place);
  });
