"""The store port on MongoDB, and its twin in memory. Nothing else imports the MongoDB driver."""
