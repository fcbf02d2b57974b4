//! What the device cannot do is an error that says so.
