"""What is done to a chunk: pure functions on arrays, and the steps of a recipe."""
