"""What is read from the LM besides answers: likelihoods, candidates' scores, and vectors for retrieval."""
