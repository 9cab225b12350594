"""What `ray_jobs.tune` is made of."""
