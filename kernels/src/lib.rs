//! Custom burn ops of Potstill, each with its CPU, CubeCL and autodiff forms
