"""The student at work: exported for other libraries, embedding news, measured, asked for what is alike."""
