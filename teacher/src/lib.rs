//! Where signals come from: teachers, asked in batches
