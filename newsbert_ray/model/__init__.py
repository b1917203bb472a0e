"""Teacher and student encoders, and the pooling and heads on top of them."""
