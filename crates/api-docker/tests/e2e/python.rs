//! To come.
crate::tests! {}
