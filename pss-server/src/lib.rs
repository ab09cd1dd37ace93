//! Server and command line of PSS.
