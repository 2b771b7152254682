"""``opsin ablate`` and ``opsin study``: the same base trained with and without things, and what that says."""
