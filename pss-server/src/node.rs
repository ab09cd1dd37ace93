//! The server.

use std::sync::Arc;

use pss_core::wire::client::ServerStatus;

use crate::config::ServerConfig;

/// A PSS server.
pub struct Server;

/// Why a server did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The server itself is not part of this build.
    #[error("server {0} cannot be started: this build has no server")]
    NotBuilt(u8),
}

/// Why a server stopped.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {}

/// A running server.
pub struct ServerHandle(());

impl Server {
    /// Starts a server.
    ///
    /// # Errors
    /// [`StartError`].
    pub fn start(config: ServerConfig) -> Result<ServerHandle, StartError> {
        Err(StartError::NotBuilt(config.id.0))
    }
}

impl ServerHandle {
    /// Asks it to stop cleanly.
    pub fn stop(&self) {}

    /// Waits until it has stopped.
    ///
    /// # Errors
    /// [`ServerError`].
    pub fn wait(&self) -> Result<(), ServerError> {
        Ok(())
    }

    /// Where it stands.
    pub fn status(&self) -> Arc<ServerStatus> {
        unreachable!("no server was started")
    }
}
