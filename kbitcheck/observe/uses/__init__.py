"""What users do with a prepared model later on."""
