// A device in the memory of the CPU, for machines without a GPU: its tensors mix with those of the CPU as little as
// those of a GPU do. Every operation that is not below runs on copies on the CPU, and an argument that lies there
// already, other than a number, is an error.
//
// PyTorch leaves the dispatch key PrivateUse1 to devices that are not its own.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

using at::IntArrayRef;
using at::Tensor;

namespace {

constexpr auto TYPE = c10::DeviceType::PrivateUse1;
const c10::Device DEVICE(TYPE, 0);
const c10::DispatchKeySet KEY(c10::DispatchKey::PrivateUse1);

struct Allocator final : c10::Allocator {
  static void free(void* memory) { c10::free_cpu(memory); }
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = bytes ? c10::alloc_cpu(bytes) : nullptr;
    return {memory, memory, &free, DEVICE};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Allocator allocator;
REGISTER_ALLOCATOR(TYPE, &allocator);

// One device, one stream, nothing to wait for.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = TYPE;
  Guard() = default;
  explicit Guard(c10::DeviceType) {}
  c10::DeviceType type() const override { return TYPE; }
  c10::Device exchangeDevice(c10::Device) const override { return DEVICE; }
  c10::Device getDevice() const override { return DEVICE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
  c10::Stream getDefaultStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Generator : at::CPUGeneratorImpl {
  Generator() {
    device_ = DEVICE;
    key_set_ = KEY;
  }
};
struct Hooks final : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isBuilt() const { return true; }  // no override: PyTorch 2.6 has neither of the two
  bool isAvailable() const { return true; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static at::Generator generator = at::make_generator<Generator>();
    return generator;
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<Generator>(); }
};
Hooks hooks;
const bool registered = (at::RegisterPrivateUse1HooksInterface(&hooks), true);

Tensor empty(IntArrayRef sizes, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
             std::optional<c10::Device>, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  return at::detail::empty_generic(sizes, &allocator, KEY, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(IntArrayRef sizes, IntArrayRef strides, std::optional<c10::ScalarType> dtype,
                     std::optional<c10::Layout>, std::optional<c10::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(sizes, strides, &allocator, KEY, c10::dtype_or_default(dtype));
}

// A tensor of the CPU over the same memory.
Tensor shared(const Tensor& tensor) {
  if (tensor.is_cpu()) {
    return tensor;
  }
  const auto options = at::TensorOptions().dtype(tensor.dtype()).device(at::kCPU);
  const int64_t entries = tensor.storage().nbytes() / tensor.element_size();
  const Tensor whole = at::from_blob(tensor.storage().mutable_data(), {entries}, options);
  Tensor part = at::empty({0}, options);
  part.set_(whole.storage(), tensor.storage_offset(), tensor.sizes(), tensor.strides());
  part = tensor.is_conj() ? part.conj() : part;
  return tensor.is_neg() ? at::_neg_view(part) : part;
}

Tensor copy_from(const Tensor& source, const Tensor& target, bool) {
  at::AutoDispatchBelowADInplaceOrView guard;
  if (source.numel() || target.numel()) {
    shared(target).copy_(shared(source));
  }
  return target;
}

Tensor copy_from_and_resize(const Tensor& source, const Tensor& target) {
  target.resize_(source.sizes());
  return copy_from(source, target, false);
}

at::Scalar number_of(const Tensor& tensor) { return shared(tensor).item(); }

const Tensor& resize(const Tensor& tensor, IntArrayRef sizes, std::optional<c10::MemoryFormat> format) {
  auto* self = tensor.unsafeGetTensorImpl();
  int64_t entries = self->storage_offset();
  entries += std::accumulate(sizes.begin(), sizes.end(), int64_t{1}, std::multiplies<>());
  auto* storage = tensor.storage().unsafeGetStorageImpl();
  const size_t before = storage->nbytes(), bytes = entries * tensor.element_size();
  if (before < bytes) {
    auto memory = allocator.allocate(bytes);
    if (before) {
      std::memcpy(memory.get(), storage->data(), before);
    }
    storage->set_data_ptr(std::move(memory));
    storage->set_nbytes(bytes);
  }
  if (tensor.sizes() != sizes) {
    self->set_sizes_contiguous(sizes);
  }
  if (format.has_value() && *format != c10::MemoryFormat::Preserve) {
    self->empty_tensor_restride(*format);
  }
  return tensor;
}

Tensor& set_part(Tensor& tensor, c10::Storage storage, int64_t offset, IntArrayRef sizes, IntArrayRef strides) {
  auto* self = tensor.unsafeGetTensorImpl();
  self->set_storage_keep_dtype(std::move(storage));
  self->set_storage_offset(offset);
  if (strides.size() == sizes.size()) {
    self->set_sizes_and_strides(sizes, strides);
  } else {
    self->set_sizes_contiguous(sizes);
  }
  return tensor;
}

Tensor& set_whole(Tensor& tensor, c10::Storage storage) {
  const int64_t entries = storage.nbytes() / tensor.element_size();
  return set_part(tensor, std::move(storage), 0, {entries}, {});
}

void check_devices(const Tensor& one, const Tensor& other) {
  TORCH_CHECK(one.device() == other.device(), "a convolution of tensors on ", one.device(), " and ", other.device());
}

Tensor convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, IntArrayRef stride,
                   IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef output_padding,
                   int64_t groups) {
  check_devices(x, weight);
  std::optional<Tensor> own_bias;
  if (bias.has_value() && bias->defined()) {
    check_devices(x, *bias);
    own_bias = shared(*bias);
  }
  return at::convolution(shared(x), shared(weight), own_bias, stride, padding, dilation, transposed, output_padding,
                         groups)
      .to(DEVICE);
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& gradient, const Tensor& x, const Tensor& weight,
                                                        IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                                        bool transposed, IntArrayRef output_padding, int64_t groups,
                                                        std::array<bool, 3> wanted) {
  check_devices(gradient, x);
  check_devices(x, weight);
  const int64_t channels = transposed ? weight.size(1) * groups : weight.size(0);
  auto found = at::convolution_backward(shared(gradient), shared(x), shared(weight), IntArrayRef(channels), stride,
                                        padding, dilation, transposed, output_padding, groups, wanted);
  const auto here = [](const Tensor& t) { return t.defined() ? t.to(DEVICE) : t; };
  return {here(std::get<0>(found)), here(std::get<1>(found)), here(std::get<2>(found))};
}

// Attention is computed step by step, as on a GPU where no fused kernel takes it.
int64_t no_fused_attention(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool,
                           std::optional<double>, bool) {
  return 0;
}

void check_argument(const Tensor& tensor, const std::string& name) {
  TORCH_CHECK(!tensor.defined() || !tensor.is_cpu() || tensor.dim() == 0, name, ": got a tensor of shape ",
              tensor.sizes(), " on the CPU; expected all tensors on one device");
}

void on_the_cpu(const c10::OperatorHandle& operation, torch::jit::Stack* stack) {
  const std::string name = operation.schema().name();
  // indices and the sources of copies may lie on the CPU
  if (name.find("index") == std::string::npos && name.find("copy") == std::string::npos) {
    for (const auto& value : torch::jit::last(*stack, operation.schema().arguments().size())) {
      if (value.isTensor()) {
        check_argument(value.toTensor(), name);
      } else if (value.isTensorList()) {
        for (const auto& tensor : value.toTensorVector()) {
          check_argument(tensor, name);
        }
      }
    }
  }
  at::native::cpu_fallback(operation, stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("_local_scalar_dense", number_of);
  library.impl("resize_", resize);
  library.impl("set_.source_Storage_storage_offset", set_part);
  library.impl("set_.source_Storage", set_whole);
  library.impl("as_strided", at::native::as_strided_tensorimpl);
  library.impl("view", at::native::view);
  library.impl("_reshape_alias", at::native::_reshape_alias);
  library.impl("unfold", at::native::unfold);
  library.impl("view_as_real", at::native::view_as_real);
  library.impl("view_as_complex", at::native::view_as_complex);
  library.impl("convolution_overrideable", convolution);
  library.impl("convolution_backward_overrideable", convolution_backward);
  library.impl("_fused_sdp_choice", no_fused_attention);
}
