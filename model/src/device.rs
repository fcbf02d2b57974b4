//! Devices by the names that users type.

use std::panic::{AssertUnwindSafe, catch_unwind};

use burn::tensor::{DType, Device, Tensor};

use crate::Error;

/// The names that [`device`] accepts in this build; the first is the default.
pub const DEVICES: &[&str] = &[
    "cpu",
    #[cfg(feature = "wgpu")]
    "wgpu",
    #[cfg(feature = "vulkan")]
    "vulkan",
    #[cfg(feature = "cuda")]
    "cuda",
];

/// Returns the device with a name of [`DEVICES`]; `cuda:1` is the second CUDA device.
///
/// A device other than the CPU is tested with one sum, so that a device that does not work is reported here and not
/// during the work.
///
/// # Errors
/// Returns [`Error::NoDevice`] for a name that this build does not know, and for a device that fails the test.
pub fn device(name: &str) -> Result<Device, Error> {
    let no_device = |why: String, hint| Error::NoDevice {
        name: name.to_owned(),
        why,
        hint,
    };
    match device_by_name(name) {
        None => Err(no_device(
            format!("this build computes on {}", DEVICES.join(", ")),
            "for another device, build with its feature: `cargo build --release --features cuda`, or `wgpu`",
        )),
        Some(device) if name == "cpu" => Ok(device),
        // CubeCL panics if there is no driver or no adapter.
        Some(device) => catch_unwind(AssertUnwindSafe(|| sum_of_two_ones(&device)))
            .ok()
            .flatten()
            .filter(|sum| *sum == 2.0)
            .map(|_| device.clone())
            .ok_or_else(|| {
                no_device(
                    "the device does not compute".to_owned(),
                    "check the driver; the message before this one has the cause",
                )
            }),
    }
}

/// Checks that a device computes in a type. Many GPUs store 16-bit types that they cannot compute in, where the results
/// are garbage or the program panics.
///
/// # Errors
/// Returns [`Error::DeviceType`] if it does not.
pub fn check_device_dtype(device: &Device, dtype: DType) -> Result<(), Error> {
    // The CPU's kernels widen what the processor cannot compute in.
    match *device == Device::flex() || device.supports_dtype(dtype) {
        true => Ok(()),
        false => Err(Error::DeviceType { dtype }),
    }
}

fn device_by_name(name: &str) -> Option<Device> {
    if name == "cpu" {
        return Some(Device::flex());
    }
    #[cfg(feature = "wgpu")]
    if name == "wgpu" {
        return Some(Device::wgpu(burn::tensor::DeviceKind::DefaultDevice));
    }
    #[cfg(feature = "vulkan")]
    if name == "vulkan" {
        return Some(Device::vulkan(burn::tensor::DeviceKind::DefaultDevice));
    }
    #[cfg(feature = "cuda")]
    if let Some(index) = name.strip_prefix("cuda") {
        let index = match index.strip_prefix(':') {
            Some(index) => index.parse::<usize>().ok()?,
            None if index.is_empty() => 0,
            None => return None,
        };
        return Some(Device::cuda(index));
    }
    None
}

fn sum_of_two_ones(device: &Device) -> Option<f32> {
    let ones = Tensor::<1>::ones([2], (device, DType::F32));
    ones.sum().try_into_vec_as::<f32>().ok()?.first().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_is_always_available_and_an_unknown_name_lists_the_devices() {
        assert_eq!(DEVICES.first(), Some(&"cpu"));
        assert_eq!(sum_of_two_ones(&device("cpu").unwrap()), Some(2.0));
        let message = device("abacus").unwrap_err().to_string();
        let start = format!(
            "no device `abacus`: this build computes on {}",
            DEVICES.join(", ")
        );
        assert!(message.starts_with(&start), "{message}");
        assert!(message.contains("\nhint: "), "{message}");
    }
}
