"""Tasks in which texts, stories or dialogues and images find each other, one file each."""
