"""How frames come in: one module per detector protocol, each a thread with a blocking receive."""
