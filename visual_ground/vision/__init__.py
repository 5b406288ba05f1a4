"""Vision encoders: images become features, which are computed once and kept."""
