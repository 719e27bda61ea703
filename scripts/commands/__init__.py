"""Output and messages that the commands of this folder share."""
