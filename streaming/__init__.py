"""The long-running service: connectors in, memory buffer, chunk writer, groups, clients."""
