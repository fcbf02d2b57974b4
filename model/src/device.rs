//! Devices by the names that a person types.

use std::panic::{AssertUnwindSafe, catch_unwind};

use burn::tensor::{DType, Device, Tensor};

use crate::Error;

/// The names that [`device`] takes in this build; the first is the default.
pub const DEVICES: &[&str] = &[
    "cpu",
    #[cfg(feature = "wgpu")]
    "wgpu",
    #[cfg(feature = "vulkan")]
    "vulkan",
    #[cfg(feature = "cuda")]
    "cuda",
];

/// A device by name: one of [`DEVICES`], where `cuda:1` is the second CUDA device.
///
/// A device other than the CPU is tried with one sum, so that a machine without it is told here
/// and not in the middle of the work.
///
/// # Errors
/// [`Error::NoDevice`] for a name that this build does not know, and for a device that does not
/// compute.
pub fn device(name: &str) -> Result<Device, Error> {
    let no = |why: &str| Error::NoDevice {
        name: name.to_owned(),
        why: why.to_owned(),
    };
    match named(name) {
        None => Err(no(&format!(
            "this build computes on {}; others need a build with their feature (`cargo build --release --features cuda`, or `wgpu`)",
            DEVICES.join(", ")
        ))),
        Some(device) if name == "cpu" => Ok(device),
        // CubeCL panics where there is no driver or no adapter.
        Some(device) => catch_unwind(AssertUnwindSafe(|| two(&device)))
            .ok()
            .flatten()
            .filter(|sum| *sum == 2.0)
            .map(|_| device.clone())
            .ok_or_else(|| {
                no("it does not compute; see the message before this one, and check the driver")
            }),
    }
}

fn named(name: &str) -> Option<Device> {
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

fn two(device: &Device) -> Option<f32> {
    let ones = Tensor::<1>::ones([2], (device, DType::F32));
    ones.sum().try_into_vec_as::<f32>().ok()?.first().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_is_always_there_and_an_unknown_name_says_what_is() {
        assert_eq!(DEVICES.first(), Some(&"cpu"));
        assert_eq!(two(&device("cpu").unwrap()), Some(2.0));
        let said = device("abacus").unwrap_err().to_string();
        assert!(said.contains("`abacus`") && said.contains("cpu"), "{said}");
    }
}
