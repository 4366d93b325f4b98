"""The posterior q(θ): its memory, its arithmetic, and its kernels for GPUs."""
