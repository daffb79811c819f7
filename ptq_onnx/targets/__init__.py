"""One folder a target: its rules for ``check``, how ``benchmark`` runs it, how it is written."""
