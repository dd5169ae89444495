"""Floor 0: shapes, protocols, errors, randomness. Imports nothing from the floors above."""
