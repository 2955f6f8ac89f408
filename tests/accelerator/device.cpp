// A second device for tests, on every machine: its memory is the CPU's, its operators are the CPU's, and its tensors
// mix with the CPU's exactly as little as a GPU's do. It has generators of its own, backward passes in a thread of its
// own, autocast, and views; it knows no TF32 and no kernels of its own.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/InferSize.h>
#include <ATen/SparseTensorImpl.h>
#include <ATen/TensorUtils.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/native/SparseTensorUtils.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>

namespace {

using at::Tensor;
using c10::DeviceType;
using c10::DispatchKey;
using torch::jit::Stack;

constexpr DeviceType KIND = DeviceType::PrivateUse1;
const c10::Device HERE(KIND, 0);
const c10::Device HOST(DeviceType::CPU);

bool ours(const c10::Device& device) { return device.type() == KIND; }

// ---- memory: the CPU's, under this device's name -------------------------------------------------------------------

std::atomic<int64_t> held{0}, peak{0};

// What the device holds as long as this lives: memory of its own, or a result of the CPU's that it took over.
template <class Memory>
struct Held {
  Held(Memory memory, size_t bytes) : memory(std::move(memory)), bytes(static_cast<int64_t>(bytes)) {
    const int64_t now = held += this->bytes;
    for (int64_t most = peak; now > most && !peak.compare_exchange_weak(most, now);) {
    }
  }
  ~Held() { held -= bytes; }
  static void release(void* context) { delete static_cast<Held*>(context); }

  Memory memory;
  int64_t bytes;
};

struct Allocator final : at::Allocator {
  at::DataPtr allocate(size_t bytes) override {
    at::DataPtr pointer = c10::GetCPUAllocator()->allocate(bytes);
    void* data = pointer.get();
    return {data, new Held(std::move(pointer), bytes), &Held<at::DataPtr>::release, HERE};
  }
  at::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};

Allocator allocator;
REGISTER_ALLOCATOR(KIND, &allocator);

// ---- streams and events that do nothing: everything is done when the call returns -----------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return KIND; }
  c10::Device exchangeDevice(c10::Device) const override { return HERE; }
  c10::Device getDevice() const override { return HERE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, HERE); }
  c10::Stream getDefaultStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, HERE); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return getStream(HERE); }
  c10::Stream getNewStream(c10::Device, int) const override { return getStream(HERE); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, HERE); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// ---- generators: the CPU's algorithm, this device's state -----------------------------------------------------------

struct Generator final : at::CPUGeneratorImpl {
  Generator() { device_ = HERE; }
};

const at::Generator& default_generator() {
  static at::Generator generator = at::make_generator<Generator>();
  return generator;
}

// While it lives, what draws from the CPU's default generator draws from `wanted` instead.
struct Drawing {
  at::Generator wanted;
  at::Generator host = at::detail::getDefaultCPUGenerator();
  Tensor kept;
  explicit Drawing(at::Generator generator) : wanted(std::move(generator)) {
    std::scoped_lock lock(host.mutex());
    kept = host.get_state();
    host.set_state(wanted.get_state());
  }
  ~Drawing() {
    std::scoped_lock lock(host.mutex());
    wanted.set_state(host.get_state());
    host.set_state(kept);
  }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return default_generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<Generator>(); }
  at::Device getDeviceFromPtr(void*) const override { return HERE; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    at::DataPtr data = allocator.allocate(bytes);
    if (storage.data() != nullptr) std::memcpy(data.get(), storage.data(), std::min(bytes, storage.nbytes()));
    storage.set_data_ptr_noswap(std::move(data));
    storage.set_nbytes(bytes);
  }
};

// ---- every operator without a kernel of its own: the CPU's, on the same memory --------------------------------------

class Call {
 public:
  Call(const c10::OperatorHandle& op, Stack* stack) : op_(op), stack_(stack) {}

  void run(DispatchKey key) {
    const auto& schema = op_.schema();
    const size_t count = schema.arguments().size(), first = stack_->size() - count;
    refuse_mixing(first);
    at::Generator generator = default_generator();
    for (size_t i = first; i < stack_->size(); i++) {
      c10::IValue& value = (*stack_)[i];
      if (value.isGenerator()) {
        generator = value.toGenerator();
        TORCH_CHECK(ours(generator.device()), "Expected a '", c10::DeviceTypeName(KIND, true),
                    "' device type for generator but found '", generator.device().type(), "'");
        value = c10::IValue();
      } else if (value.isDevice()) {
        value = HOST;
      } else {
        value = lowered(value);
      }
    }
    if (op_.hasTag(at::Tag::nondeterministic_seeded)) {
      Drawing drawing(generator);
      op_.redispatchBoxed(c10::DispatchKeySet(key), stack_);
    } else {
      op_.redispatchBoxed(c10::DispatchKeySet(key), stack_);
    }
    for (auto& [host, device] : lent_) give_back(host, device);
    for (size_t i = stack_->size() - schema.returns().size(); i < stack_->size(); i++) {
      (*stack_)[i] = raised((*stack_)[i]);
    }
  }

 private:
  const c10::OperatorHandle& op_;
  Stack* stack_;
  std::vector<std::pair<Tensor, Tensor>> lent_;                  // (on the host, on the device)
  std::map<const c10::StorageImpl*, c10::Storage> hosts_, homes_;  // device's -> host's, host's -> device's

  // As CUDA: tensors of two devices never meet, but for scalars and indices on the CPU.
  void refuse_mixing(size_t first) {
    static const std::set<std::string> allowed = {
        "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index",
        "aten::copy_sparse_to_sparse_", "aten::copy_", "aten::_unsafe_index_put"};
    static const std::set<std::string> strict = {"aten::equal"};
    if (allowed.count(op_.schema().name())) return;
    const auto& arguments = op_.schema().arguments();
    auto check = [&](const Tensor& t, const c10::Argument& argument) {
      const bool written = argument.alias_info() && argument.alias_info()->isWrite();
      const bool scalar = t.defined() && t.dim() == 0 && !t.is_sparse() && !written && !strict.count(op_.schema().name());
      TORCH_CHECK(!t.defined() || ours(t.device()) || scalar,
                  "Expected all tensors to be on the same device, but found at least two devices, ", HERE, " and ",
                  t.device(), "! (in ", op_.schema().name(), ")");
    };
    bool any = false;
    for (size_t pass = 0; pass < 2; pass++) {
      for (size_t i = first; i < stack_->size(); i++) {
        const c10::IValue& value = (*stack_)[i];
        auto see = [&](const Tensor& t) {
          if (pass == 0) any = any || (t.defined() && ours(t.device()));
          else check(t, arguments[i - first]);
        };
        if (value.isTensor()) see(value.toTensor());
        else if (value.isTensorList()) for (const Tensor& t : value.toTensorVector()) see(t);
        else if (value.isOptionalTensorList())
          for (const std::optional<Tensor>& t : value.toOptionalTensorVector()) { if (t.has_value()) see(*t); }
        else if (value.isDevice() && pass == 0) any = any || ours(value.toDevice());
      }
      if (!any) return;
    }
  }

  c10::IValue lowered(const c10::IValue& value) {
    if (value.isTensor()) return lower(value.toTensor());
    if (value.isTensorList()) {
      std::vector<Tensor> out;
      for (const Tensor& t : value.toTensorVector()) out.push_back(lower(t));
      return out;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> out;
      for (const std::optional<Tensor>& t : value.toOptionalTensorVector())
        out.push_back(t.has_value() ? std::optional<Tensor>(lower(*t)) : std::nullopt);
      return out;
    }
    return value;
  }

  c10::IValue raised(const c10::IValue& value) {
    if (value.isTensor()) return raise(value.toTensor());
    if (value.isTensorList()) {
      std::vector<Tensor> out;
      for (const Tensor& t : value.toTensorVector()) out.push_back(raise(t));
      return out;
    }
    return value;
  }

  c10::Storage host_storage(const c10::Storage& storage) {
    auto& known = hosts_[storage.unsafeGetStorageImpl()];
    if (!known) {
      at::DataPtr pointer(const_cast<void*>(storage.data()), HOST);
      known = c10::Storage(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(pointer),
                           c10::GetCPUAllocator(), true);
      homes_[known.unsafeGetStorageImpl()] = storage;
    }
    return known;
  }

  Tensor lower(const Tensor& t) {
    if (!t.defined() || !ours(t.device())) return t;
    Tensor host;
    if (t.is_sparse()) {
      auto* impl = at::sparse::get_sparse_impl(t);
      auto made = c10::make_intrusive<at::SparseTensorImpl>(c10::DispatchKeySet(DispatchKey::SparseCPU), t.dtype());
      made->resize_(impl->sparse_dim(), impl->dense_dim(), impl->sizes());
      made->set_indices_and_values_unsafe(lower(impl->indices()), lower(impl->values()));
      made->set_coalesced(impl->coalesced());
      host = Tensor(std::move(made));
    } else {
      host = over(host_storage(t.storage()), DispatchKey::CPU, t);
    }
    lent_.emplace_back(host, t);
    return host;
  }

  static Tensor over(c10::Storage storage, DispatchKey key, const Tensor& like) {
    Tensor made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
    made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
    made._set_conj(like.is_conj());
    made._set_neg(like.is_neg());
    if (like.unsafeGetTensorImpl()->is_wrapped_number()) made.unsafeGetTensorImpl()->set_wrapped_number(true);
    return made;
  }

  // What a kernel did to an argument's shape or memory is done to the device's own tensor.
  void give_back(const Tensor& host, const Tensor& device) {
    if (host.is_sparse()) {
      auto* from = at::sparse::get_sparse_impl(host);
      auto* to = at::sparse::get_sparse_impl(device);
      if (from->indices().storage().data() != to->indices().storage().data() ||
          from->values().storage().data() != to->values().storage().data() || from->nnz() != to->nnz()) {
        to->resize_(from->sparse_dim(), from->dense_dim(), from->sizes());
        to->set_indices_and_values_unsafe(raise(from->indices()), raise(from->values()));
      }
      to->set_coalesced(from->coalesced());
      return;
    }
    const c10::Storage& own = device.storage();
    if (host.storage().data() != own.data()) {
      const c10::Storage& grown = host.storage();
      at::DataPtr data = allocator.allocate(grown.nbytes());
      std::memcpy(data.get(), grown.data(), grown.nbytes());
      own.set_data_ptr_noswap(std::move(data));
      own.set_nbytes(grown.nbytes());
    }
    if (host.sizes() != device.sizes() || host.strides() != device.strides()) {
      device.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
    }
  }

  Tensor raise(const Tensor& host) {
    if (!host.defined() || ours(host.device())) return host;
    for (auto& [lent, device] : lent_)
      if (lent.unsafeGetTensorImpl() == host.unsafeGetTensorImpl()) return device;
    if (host.is_sparse()) {
      auto* impl = at::sparse::get_sparse_impl(host);
      auto made =
          c10::make_intrusive<at::SparseTensorImpl>(c10::DispatchKeySet(DispatchKey::SparsePrivateUse1), host.dtype());
      made->resize_(impl->sparse_dim(), impl->dense_dim(), impl->sizes());
      made->set_indices_and_values_unsafe(raise(impl->indices()), raise(impl->values()));
      made->set_coalesced(impl->coalesced());
      return Tensor(std::move(made));
    }
    auto home = homes_.find(host.storage().unsafeGetStorageImpl());
    if (home == homes_.end()) {
      c10::Storage kept = host.storage();
      void* data = const_cast<void*>(kept.data());
      at::DataPtr pointer(data, new Held(kept, kept.nbytes()), &Held<c10::Storage>::release, HERE);
      c10::Storage made(c10::Storage::use_byte_size_t(), kept.nbytes(), std::move(pointer), &allocator, true);
      home = homes_.emplace(kept.unsafeGetStorageImpl(), std::move(made)).first;
    }
    return over(home->second, DispatchKey::PrivateUse1, host);
  }
};

void on_the_host(const c10::OperatorHandle& op, Stack* stack) { Call(op, stack).run(DispatchKey::CPU); }
void on_the_host_sparse(const c10::OperatorHandle& op, Stack* stack) { Call(op, stack).run(DispatchKey::SparseCPU); }

// ---- the operators that know of devices -----------------------------------------------------------------------------

Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &allocator,
                                   c10::DispatchKeySet(DispatchKey::PrivateUse1), c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &allocator,
                                           c10::DispatchKeySet(DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}

// A dense tensor of this device as one of the CPU's on the same memory.
Tensor host_view(const Tensor& t) {
  if (!ours(t.device())) return t;
  at::DataPtr pointer(const_cast<void*>(t.storage().data()), HOST);
  c10::Storage storage(c10::Storage::use_byte_size_t(), t.storage().nbytes(), std::move(pointer),
                       c10::GetCPUAllocator(), false);
  Tensor made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(DispatchKey::CPU),
                                                         t.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  made._set_conj(t.is_conj());
  made._set_neg(t.is_neg());
  return made;
}

Tensor device_copy(const Tensor& host) {
  Tensor made = at::empty_strided(host.sizes(), host.strides(), host.options().device(HERE));
  host_view(made).copy_(host);
  return made;
}

Tensor copy_from(const Tensor& self, const Tensor& to, bool) {
  host_view(to).copy_(host_view(self));
  return to;
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& to) {
  to.resize_(self.sizes());
  return copy_from(self, to, false);
}

at::Scalar local_scalar(const Tensor& self) { return host_view(self).item(); }

const Tensor& resize(const Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  auto wanted = C10_AS_INTARRAYREF_SLOW(size);
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(wanted);
  if (format.has_value()) impl->empty_tensor_restride(*format);
  size_t bytes = (impl->numel() + impl->storage_offset()) * self.itemsize();
  if (self.storage().nbytes() < bytes) at::detail::getPrivateUse1Hooks().resizePrivateUse1Bytes(self.storage(), bytes);
  return self;
}

Tensor as_strided(const Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                  std::optional<c10::SymInt> offset) {
  Tensor made = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(self.storage()),
                                                         self.key_set(), self.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
      offset.has_value() ? offset->expect_int() : self.storage_offset());
  return made;
}

Tensor reshape_alias(const Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return as_strided(self, size, stride, std::nullopt);
}

Tensor view(const Tensor& self, c10::SymIntArrayRef size) {
  auto wanted = at::infer_size_dv(C10_AS_INTARRAYREF_SLOW(size), self.numel());
  auto stride = at::detail::computeStride(self.sizes(), self.strides(), wanted);
  TORCH_CHECK(stride.has_value(), "view size is not compatible with input tensor's size and stride");
  return as_strided(self, c10::fromIntArrayRefSlow(wanted), c10::fromIntArrayRefSlow(*stride), std::nullopt);
}

Tensor& set_storage(Tensor& self, c10::Storage source, c10::SymInt offset, c10::SymIntArrayRef size,
                    c10::SymIntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  if (stride.empty() && !sizes.empty()) {
    impl->set_storage_offset(offset.expect_int());
    impl->set_sizes_contiguous(sizes);
  } else {
    impl->set_sizes_and_strides(sizes, C10_AS_INTARRAYREF_SLOW(stride), offset.expect_int());
  }
  return self;
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sym_sizes(), source.sym_strides());
}

Tensor& set_whole_storage(Tensor& self, c10::Storage source) {
  int64_t size = source.nbytes() / self.itemsize();
  return set_storage(self, std::move(source), 0, {c10::SymInt(size)}, {c10::SymInt(1)});
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& gradient, const Tensor& input, const Tensor& weight, c10::SymIntArrayRef stride,
    c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef output_padding,
    c10::SymInt groups, std::array<bool, 3> mask) {
  const int64_t channels = transposed ? weight.size(1) * groups.expect_int() : weight.size(0);
  auto [i, w, b] = at::convolution_backward_symint(
      host_view(gradient), host_view(input), host_view(weight), c10::SymIntArrayRef{c10::SymInt(channels)}, stride,
      padding, dilation, transposed, output_padding, groups, mask);
  auto up = [](const Tensor& t) { return t.defined() ? device_copy(t) : t; };
  return {up(i), up(w), up(b)};
}

Tensor convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                   c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                   bool transposed, c10::SymIntArrayRef output_padding, c10::SymInt groups) {
  std::optional<Tensor> host_bias;
  if (bias.has_value() && bias->defined()) host_bias = host_view(*bias);
  return device_copy(at::convolution_symint(host_view(input), host_view(weight), host_bias, stride, padding, dilation,
                                            transposed, output_padding, groups));
}

// torch expects the cells of recurrent networks as kernels of the device; the CPU has none.
using std::optional;
Tensor sum_of(const Tensor& one, const Tensor& other, const optional<Tensor>& b, const optional<Tensor>& c) {
  Tensor total = one + other;
  if (b.has_value() && b->defined()) total = total + *b;
  if (c.has_value() && c->defined()) total = total + *c;
  return total;
}

std::tuple<Tensor, Tensor, Tensor> lstm_cell(const Tensor& input, const Tensor& hidden, const Tensor& cx,
                                             const optional<Tensor>& b_ih, const optional<Tensor>& b_hh) {
  auto gates = sum_of(input, hidden, b_ih, b_hh).chunk(4, 1);
  Tensor i = gates[0].sigmoid(), f = gates[1].sigmoid(), g = gates[2].tanh(), o = gates[3].sigmoid();
  Tensor cy = f * cx + i * g;
  return {o * cy.tanh(), cy, at::cat({i, f, g, o}, 1)};
}

std::tuple<Tensor, Tensor, Tensor> lstm_cell_backward(const optional<Tensor>& grad_hy, const optional<Tensor>& grad_cy,
                                                      const Tensor& cx, const Tensor& cy, const Tensor& workspace,
                                                      bool has_bias) {
  auto gates = workspace.chunk(4, 1);
  Tensor i = gates[0], f = gates[1], g = gates[2], o = gates[3], t = cy.tanh();
  Tensor dh = grad_hy.has_value() && grad_hy->defined() ? *grad_hy : at::zeros_like(cx);
  Tensor dc = dh * o * (1 - t * t);
  if (grad_cy.has_value() && grad_cy->defined()) dc = dc + *grad_cy;
  Tensor grads = at::cat({dc * g * i * (1 - i), dc * cx * f * (1 - f), dc * i * (1 - g * g), dh * t * o * (1 - o)}, 1);
  return {grads, dc * f, has_bias ? grads.sum(0) : Tensor()};
}

std::tuple<Tensor, Tensor> gru_cell(const Tensor& input, const Tensor& hidden, const Tensor& hx,
                                    const optional<Tensor>& b_ih, const optional<Tensor>& b_hh) {
  auto in = sum_of(input, at::zeros_like(input), b_ih, std::nullopt).chunk(3, 1);
  auto hid = sum_of(hidden, at::zeros_like(hidden), b_hh, std::nullopt).chunk(3, 1);
  Tensor r = (in[0] + hid[0]).sigmoid(), z = (in[1] + hid[1]).sigmoid(), n = (in[2] + r * hid[2]).tanh();
  return {n + z * (hx - n), at::cat({r, z, n, hx, hid[2]}, 1)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gru_cell_backward(const Tensor& grad, const Tensor& workspace,
                                                                     bool has_bias) {
  auto kept = workspace.chunk(5, 1);
  Tensor r = kept[0], z = kept[1], n = kept[2], hx = kept[3], h = kept[4];
  Tensor dn = grad * (1 - z) * (1 - n * n), dz = grad * (hx - n) * z * (1 - z), dr = dn * h * r * (1 - r);
  Tensor in = at::cat({dr, dz, dn}, 1), hid = at::cat({dr, dz, dn * r}, 1);
  return {in, hid, grad * z, has_bias ? in.sum(0) : Tensor(), has_bias ? hid.sum(0) : Tensor()};
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_host>()); }
TORCH_LIBRARY_IMPL(_, SparsePrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_host_sparse>());
}

// A fallback is asked only where torch has no composite kernel. Those made for dense tensors would be taken for sparse
// ones; those of structured operators call the variant with `out=`, which some kernels resize with a warning.
void register_before(torch::Library& m, DispatchKey kernel, std::initializer_list<DispatchKey> composites,
                     const std::function<torch::CppFunction()>& fallback) {
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const c10::OperatorName& name : dispatcher.getAllOpNames()) {
    auto op = dispatcher.findOp(name);
    if (name.name.rfind("aten::", 0) || !op || !op->hasKernelForDispatchKey(kernel)) continue;
    for (DispatchKey composite : composites) {
      if (!op->hasKernelForDispatchKey(composite)) continue;
      std::string full = name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
      m.impl(full.c_str(), fallback());
      break;
    }
  }
}

TORCH_LIBRARY_IMPL(aten, SparsePrivateUse1, m) {
  register_before(m, DispatchKey::SparseCPU,
                  {DispatchKey::CompositeExplicitAutograd, DispatchKey::CompositeExplicitAutogradNonFunctional,
                   DispatchKey::CompositeImplicitAutograd},
                  [] { return torch::CppFunction::makeFromBoxedFunction<&on_the_host_sparse>(); });
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  register_before(m, DispatchKey::CPU, {DispatchKey::CompositeExplicitAutogradNonFunctional},
                  [] { return torch::CppFunction::makeFromBoxedFunction<&on_the_host>(); });
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("resize_", resize);
  m.impl("as_strided", as_strided);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("view", view);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("set_.source_Storage", set_whole_storage);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
  m.impl("_thnn_fused_lstm_cell", lstm_cell);
  m.impl("_thnn_fused_lstm_cell_backward_impl", lstm_cell_backward);
  m.impl("_thnn_fused_gru_cell", gru_cell);
  m.impl("_thnn_fused_gru_cell_backward", gru_cell_backward);
}

// Copies resolve a pending conjugation or negation by themselves; torch's own fallback for these keys would copy for ever.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, Negative, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
#define LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define WIDE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define WIDE_UNLESS_SAID(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define PROMOTE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
  AT_FORALL_LOWER_PRECISION_FP(LOWER)
  AT_FORALL_FP32(WIDE)
  AT_FORALL_FP32_SET_OPT_DTYPE(WIDE_UNLESS_SAID)
  AT_FORALL_PROMOTE(PROMOTE)
}

TORCH_LIBRARY(emulated_device, m) {
  m.def("manual_seed(int seed) -> ()", [](int64_t seed) {
    auto generator = default_generator();
    std::scoped_lock lock(generator.mutex());
    generator.set_current_seed(static_cast<uint64_t>(seed));
  });
  m.def("memory_allocated() -> int", []() { return held.load(); });
  m.def("max_memory_allocated() -> int", []() { return peak.load(); });
  m.def("reset_peak_memory_stats() -> ()", []() { peak = held.load(); });
  m.def("get_state() -> Tensor", []() { return default_generator().get_state(); });
  m.def("set_state(Tensor state) -> ()", [](const Tensor& state) {
    auto generator = default_generator();
    generator.set_state(state);
  });
}

Hooks* registered = [] {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  return &hooks;
}();

}  // namespace
