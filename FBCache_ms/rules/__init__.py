"""What a caching rule says: when a step is reused, what is added then, which steps are computed anyway."""
