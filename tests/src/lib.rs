//! Test harness of PSS.
