// Says that there is no accelerator, so that the autograd engine asks no driver for a stream: see pretended_cuda.py.
#include <cstdint>
#include <optional>

namespace c10 {
enum class DeviceType : int8_t {};
}

namespace at {
std::optional<c10::DeviceType> getAccelerator(bool) { return std::nullopt; }

namespace accelerator {
std::optional<c10::DeviceType> getAccelerator(bool) { return std::nullopt; }
bool isAccelerator(c10::DeviceType) { return false; }
}  // namespace accelerator
}  // namespace at
