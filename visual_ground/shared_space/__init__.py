"""A space that texts and images share, in closed form from second moments alone."""
