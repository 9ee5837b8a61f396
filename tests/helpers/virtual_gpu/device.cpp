// A CUDA device for torch that is built without CUDA: its memory is the host's, but torch keeps it
// apart. Every operator runs as the CPU's on the same memory, if all its tensors are on the device,
// as CUDA demands. What makes a host wait for a device is refused while a graph is captured, and a
// capture leaves memory as it was. Memory that nobody has written holds no numbers.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <vector>

namespace {

using at::Tensor;
constexpr auto CUDA = c10::DeviceType::CUDA;
const c10::DispatchKeySet KEYS(c10::DispatchKey::CUDA);

bool capturing = false;
int64_t waited = 0;  // how often the host has
// Never destroyed: memory is given back until the very end.
auto& lock = *new std::mutex;
auto& blocks = *new std::map<void*, size_t>;
auto& before = *new std::map<void*, std::vector<char>>;  // of the capture
auto& generators = *new std::set<const void*>;           // those of the device

void give_back(void* data) {
  std::lock_guard<std::mutex> hold(lock);
  blocks.erase(data);
  before.erase(data);
  std::free(data);
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* data = size ? std::aligned_alloc(64, (size + 63) / 64 * 64) : nullptr;
    if (data) {
      std::memset(data, 0xFF, size);  // NaN in every floating dtype
      std::lock_guard<std::mutex> hold(lock);
      blocks[data] = size;
    }
    return {data, data, &give_back, c10::Device(CUDA, 0)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, std::size_t size) const override {
    std::memcpy(to, from, size);
  }
};
auto& memory = *new Memory;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return CUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return {CUDA, 0}; }
  c10::Device getDevice() const override { return {CUDA, 0}; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override {
    return c10::Stream(c10::Stream::DEFAULT, c10::Device(CUDA, 0));
  }
  c10::Stream getNewStream(c10::Device device, int) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};

// The host waits for the device.
void waits(const std::string& what) {
  ++waited;
  TORCH_CHECK(!capturing, "operation not permitted when stream is capturing: ", what);
}

bool ours(const Tensor& x) { return x.defined() && x.device().type() == CUDA; }

// The same memory as the host's tensor.
Tensor host(const Tensor& x) {
  const auto& storage = x.storage();
  c10::DataPtr data(storage.mutable_data(), c10::Device(c10::kCPU));
  c10::Storage alias(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data),
                     c10::GetAllocator(c10::kCPU), /*resizable=*/true);
  auto y = at::detail::make_tensor<c10::TensorImpl>(
      std::move(alias), c10::DispatchKeySet(c10::DispatchKey::CPU), x.dtype());
  y.unsafeGetTensorImpl()->set_sizes_and_strides(x.sizes(), x.strides(), x.storage_offset());
  return y;
}

// A tensor on the storage of one of the device's.
Tensor view(const Tensor& of, c10::IntArrayRef size, c10::IntArrayRef stride, int64_t offset,
            caffe2::TypeMeta dtype) {
  auto y = at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(of.storage()), of.key_set(), dtype);
  y.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return y;
}

// ------------------------------------------------------------------ operators of its own

Tensor filled(Tensor x) {
  const auto& context = at::globalContext();
  if (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory()) {
    if (x.is_floating_point()) {
      x.fill_(NAN);
    } else if (at::isIntegralType(x.scalar_type(), false)) {
      x.fill_(x.scalar_type() == at::kLong ? INT64_MAX : INT8_MAX);
    }
  }
  return x;
}

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool>,
             std::optional<at::MemoryFormat> format) {
  return filled(
      at::detail::empty_generic(size, &memory, KEYS, dtype.value_or(at::kFloat), format));
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride,
                     std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                     std::optional<at::Device>, std::optional<bool>) {
  return filled(at::detail::empty_strided_generic(size, stride, &memory, KEYS,
                                                  dtype.value_or(at::kFloat)));
}

Tensor& copy(Tensor& to, const Tensor& from, bool) {
  at::AutoDispatchBelowADInplaceOrView below;
  if (!ours(to)) waits("a copy to the host");
  Tensor target = ours(to) ? host(to) : to;
  target.copy_(ours(from) ? host(from) : from);
  return to;
}

Tensor as_strided(const Tensor& x, at::IntArrayRef size, at::IntArrayRef stride,
                  std::optional<int64_t> offset) {
  return view(x, size, stride, offset.value_or(x.storage_offset()), x.dtype());
}

Tensor& set_storage(Tensor& x, at::Storage source, int64_t offset, at::IntArrayRef size,
                    at::IntArrayRef stride) {
  auto* impl = x.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  if (stride.empty() && !size.empty()) {
    impl->set_storage_offset(offset);
    impl->set_sizes_contiguous(size);
  } else {
    impl->set_sizes_and_strides(size, stride, offset);
  }
  return x;
}

// ------------------------------------------------------------------ all others

bool begins(const std::string& name, std::initializer_list<const char*> with) {
  for (const char* start : with)
    if (name.rfind(start, 0) == 0) return true;
  return false;
}

struct Call {
  std::string name;
  std::vector<std::pair<Tensor, Tensor>> pairs;  // the device's and the host's

  Tensor down(const Tensor& x) {
    if (!x.defined()) return x;
    if (!ours(x)) {
      const bool index = begins(name, {"aten::index", "aten::_index_put", "aten::_foreach"});
      TORCH_CHECK(index || x.dim() == 0,
                  "Expected all tensors to be on the same device, but one is on ", x.device(),
                  " in ", name);
      if (x.dim()) waits(name);
      return x;
    }
    for (auto& [mine, theirs] : pairs)
      if (mine.is_same(x)) return theirs;
    pairs.emplace_back(x, host(x));
    return pairs.back().second;
  }

  void down(c10::IValue& value) {
    if (value.isTensor()) {
      value = down(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<Tensor> list;
      for (const Tensor& x : value.toTensorVector()) list.push_back(down(x));
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (std::optional<Tensor> x : value.toOptionalTensorList())
        list.push_back(x ? std::optional<Tensor>(down(*x)) : x);
      value = list;
    } else if (value.isDevice() && value.toDevice().type() == CUDA) {
      value = c10::Device(c10::kCPU);
    } else if (value.isGenerator()) {
      TORCH_CHECK(generators.count(value.toGenerator().unsafeGetGeneratorImpl()),
                  "Expected a 'cuda' device type for generator but found 'cpu' in ", name);
    }
  }

  // An operator may have resized what it was given.
  void settle() {
    for (auto& [mine, theirs] : pairs) {
      const auto& storage = theirs.storage();
      auto* impl = mine.unsafeGetTensorImpl();
      if (storage.data() != mine.storage().data()) {
        c10::Storage fresh(c10::Storage::use_byte_size_t(), storage.nbytes(), &memory, true);
        std::memcpy(fresh.mutable_data(), storage.data(), storage.nbytes());
        impl->set_storage_keep_dtype(std::move(fresh));
      }
      if (theirs.sizes() != mine.sizes() || theirs.strides() != mine.strides() ||
          theirs.storage_offset() != mine.storage_offset())
        impl->set_sizes_and_strides(theirs.sizes(), theirs.strides(), theirs.storage_offset());
    }
  }

  Tensor up(const Tensor& y) {
    if (!y.defined()) return y;
    for (auto& [mine, theirs] : pairs)
      if (theirs.is_same(y)) return mine;
    const void* data = y.storage().data();
    for (auto& [mine, theirs] : pairs)
      if (data && data == mine.storage().data())
        return view(mine, y.sizes(), y.strides(), y.storage_offset(), y.dtype());
    Tensor fresh = at::empty_strided(y.sizes(), y.strides(), y.options().device(CUDA));
    host(fresh).copy_(y);
    return fresh;
  }

  void up(c10::IValue& value) {
    if (value.isTensor()) {
      value = up(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<Tensor> list;
      for (const Tensor& y : value.toTensorVector()) list.push_back(up(y));
      value = list;
    }
  }
};

void on_the_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  Call call{schema.name(), {}};
  if (begins(call.name, {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal",
                         "aten::masked_select", "aten::unique", "aten::_unique"}))
    waits(call.name);
  for (auto i = stack->size() - schema.arguments().size(); i < stack->size(); ++i)
    call.down((*stack)[i]);
  {
    at::AutoDispatchBelowADInplaceOrView below;
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  }
  call.settle();
  for (auto i = stack->size() - schema.returns().size(); i < stack->size(); ++i)
    call.up((*stack)[i]);
}

void capture(bool on) {
  std::lock_guard<std::mutex> hold(lock);
  if (on) {
    for (auto& [data, size] : blocks) {
      auto* bytes = static_cast<char*>(data);
      before.emplace(data, std::vector<char>(bytes, bytes + size));
    }
  } else {
    for (auto& [data, was] : before) std::memcpy(data, was.data(), was.size());
    before.clear();
  }
  capturing = on;
}

const bool installed = (c10::SetAllocator(CUDA, &memory, 1), true);

}  // namespace

namespace at {

struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::kCPU); }
  const Generator& getDefaultGenerator(DeviceIndex index) const override {
    static Generator made = getNewGenerator(index);
    return made;
  }
  Generator getNewGenerator(DeviceIndex) const override {
    Generator made = make_generator<CPUGeneratorImpl>();
    generators.insert(made.unsafeGetGeneratorImpl());
    return made;
  }
};
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, CUDAHooks)

}  // namespace at

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_host>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("copy_", TORCH_FN(copy));
  m.impl("as_strided", TORCH_FN(as_strided));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(set_storage));
}

TORCH_LIBRARY(virtual_gpu, m) {
  m.def("capture(bool on) -> ()", &capture);
  m.def("host(Tensor x) -> Tensor");
  m.def("waited() -> int", +[] { return waited; });
}

TORCH_LIBRARY_IMPL(virtual_gpu, CUDA, m) { m.impl("host", TORCH_FN(host)); }
