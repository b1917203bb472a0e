"""Code that an exported folder carries with it, so that other libraries load it without this package."""
