"""What every other package uses: errors, records, files, the console. Nothing here knows a model."""
