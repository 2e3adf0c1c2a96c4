"""What is measured and checked about peftkern: timings beside its peers, and its kernels' compiled code."""
