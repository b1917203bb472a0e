"""Uses a trained student: predictions, embeddings, similar texts, export, measurements of speed."""
