// What torch's C++ asks of a GPU before it lets a tensor say it is on one; see __init__.py.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstdlib>
#include <map>
#include <mutex>

namespace {

std::mutex mutex;
std::map<const char*, size_t> pinned;  // what was asked for as pinned memory, by address

void unpin(void* place) {
  const std::lock_guard<std::mutex> lock(mutex);
  pinned.erase(static_cast<const char*>(place));
  std::free(place);
}

struct Pinning final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    const std::lock_guard<std::mutex> lock(mutex);
    void* place = std::aligned_alloc(64, (size + 64) / 64 * 64);
    pinned[static_cast<const char*>(place)] = size + 1;
    return {place, place, &unpin, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &unpin; }
  void copy_data(void* to, const void* from, size_t size) const override {
    default_copy_data(to, from, size);
  }
} pinning;

// One device, one stream, and events that have always happened.
struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device getDevice() const override { return c10::Device(c10::DeviceType::CUDA, 0); }
  c10::Device exchangeDevice(c10::Device) const override { return getDevice(); }
  c10::Stream getStream(c10::Device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, c10::Device(c10::DeviceType::CUDA, 0));
  }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag)
      const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

}  // namespace

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
}

namespace at {

struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex current_device() const override { return 0; }
  Allocator* getPinnedMemoryAllocator() const override { return &pinning; }
  bool isPinnedPtr(const void* place) const override {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto* wanted = static_cast<const char*>(place);
    auto next = pinned.upper_bound(wanted);
    return next != pinned.begin() && wanted < std::prev(next)->first + std::prev(next)->second;
  }
};
REGISTER_CUDA_HOOKS(CUDAHooks);

}  // namespace at
