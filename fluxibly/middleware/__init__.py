"""The built-in middleware, a file each."""
