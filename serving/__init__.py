"""How HTTP is answered; see docs/architecture.md."""
