//! The tiny pid 1 of `--init` containers: it forwards signals and reaps what others leave.
