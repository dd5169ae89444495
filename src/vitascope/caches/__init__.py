"""Floor 1: what is kept from one call to the next. Tensors only; models and samplers are not known here."""
