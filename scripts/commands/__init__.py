"""How the commands of this folder end."""
