//! The wire against replies that were recorded and others that were typed.
