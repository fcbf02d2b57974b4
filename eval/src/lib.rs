//! What is measured: metrics, intervals, the report
