//! How the allocator deals with tensors.

// The C library's own function.
#![allow(unsafe_code)]

/// Lets all threads allocate from one heap, where the C library is glibc; elsewhere nothing. For a program
/// to call before it starts a thread.
///
/// Otherwise each thread has heaps of 64 MiB of its own, and what it frees is of no use to the others: a
/// training step then holds up to a tenth more, now and then. Tensors are few and large, so threads do not
/// wait for one another.
pub fn one_heap() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        unsafe extern "C" {
            fn mallopt(parameter: std::ffi::c_int, value: std::ffi::c_int) -> std::ffi::c_int;
        }
        /// `M_ARENA_MAX` of malloc.h.
        const ARENA_MAX: std::ffi::c_int = -8;
        // SAFETY: glibc's own function, with a parameter that it documents. Where it refuses, nothing changes.
        unsafe { mallopt(ARENA_MAX, 1) };
    }
}

/// Gives free memory of the heap back to the system, where the C library is glibc; elsewhere nothing. For
/// measuring: what is resident then is in use.
pub fn trim_heap() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        unsafe extern "C" {
            fn malloc_trim(keep: usize) -> std::ffi::c_int;
        }
        // SAFETY: glibc's own function; it touches free memory alone.
        unsafe { malloc_trim(0) };
    }
}
