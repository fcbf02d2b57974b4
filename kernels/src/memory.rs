//! Settings of the C library's allocator that suit tensors.

// The functions of the C library are called directly.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};

/// Makes all threads allocate from one heap that keeps up to 256 MiB of freed memory, if the C library is glibc; does
/// nothing elsewhere. A program calls this before it starts a thread.
///
/// By default each thread has its own heaps of 64 MiB, and memory that one thread frees cannot be used by the
/// others: a training step then sometimes holds up to a tenth more. Tensors are few and large, so sharing one
/// heap does not make threads wait for one another. By default the end of the heap also goes back to the system whenever
/// 128 KiB of it are free, and its pages are new and filled with zeros when they are used again: a fifth of the time of a small
/// student's step. Blocks above 32 MiB have mappings of their own, as by default.
pub fn use_one_heap() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        unsafe extern "C" {
            fn mallopt(parameter: std::ffi::c_int, value: std::ffi::c_int) -> std::ffi::c_int;
        }
        // The parameters of malloc.h.
        const M_ARENA_MAX: std::ffi::c_int = -8;
        const M_TRIM_THRESHOLD: std::ffi::c_int = -1;
        const M_MMAP_THRESHOLD: std::ffi::c_int = -3;
        let parameters = [
            (M_ARENA_MAX, 1),
            (M_TRIM_THRESHOLD, 256 << 20),
            (M_MMAP_THRESHOLD, 32 << 20),
        ];
        for (parameter, value) in parameters {
            // SAFETY: the signature is glibc's, and the parameters are documented. If glibc refuses one, nothing changes.
            unsafe { mallopt(parameter, value) };
        }
    }
}

/// Returns free heap memory to the system if the C library is glibc; does nothing elsewhere. Measurements call
/// this so that resident memory is memory in use.
pub fn trim_heap() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        unsafe extern "C" {
            fn malloc_trim(keep: usize) -> std::ffi::c_int;
        }
        // SAFETY: the signature is glibc's, and the function touches free memory only.
        unsafe { malloc_trim(0) };
    }
}

/// The system's allocator, which reports each allocation that the system refuses. A program uses it with
/// `#[global_allocator]`.
#[derive(Debug)]
pub struct ReportingHeap {
    /// Called with the number of bytes that were refused. It must not allocate.
    pub on_refusal: fn(usize),
}

impl ReportingHeap {
    fn checked(&self, pointer: *mut u8, bytes: usize) -> *mut u8 {
        if pointer.is_null() {
            (self.on_refusal)(bytes);
        }
        pointer
    }
}

// SAFETY: every call is passed to the system's allocator as it came, and its result is returned unchanged.
unsafe impl GlobalAlloc for ReportingHeap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller keeps the contract of `GlobalAlloc::alloc`, which is the system allocator's.
        self.checked(unsafe { System.alloc(layout) }, layout.size())
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as in `alloc`; the pointer came from the system's allocator.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as in `alloc`.
        self.checked(unsafe { System.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        // SAFETY: as in `dealloc`; the caller checked the new size.
        self.checked(unsafe { System.realloc(pointer, layout, bytes) }, bytes)
    }
}
