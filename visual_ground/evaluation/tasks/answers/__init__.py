"""Tasks in which the model's answers are scored, one file each: captions, questions, answers with pictures."""
