"""What is done to a run: Prefect flows over chunks, live or finished."""
