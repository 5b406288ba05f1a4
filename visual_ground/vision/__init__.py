"""The frozen vision encoder: images become features, which are computed once and kept on disk."""
