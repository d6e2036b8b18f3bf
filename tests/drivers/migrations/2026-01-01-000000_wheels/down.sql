DROP TABLE wheels;
