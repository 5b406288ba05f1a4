"""What commands share: options and what they mean, and messages on the standard error."""
