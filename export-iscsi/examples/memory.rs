//! Serves volumes in memory, to try initiators and conformance suites on:
//! `memory ADDRESS:PORT`. The targets differ in how their only disk is shown.

use std::sync::Arc;

use export_iscsi::auth::{Account, Secret};
use export_iscsi::catalog::{Catalog, LunEntry, TargetEntry};
use export_iscsi::scsi::LunSettings;
use export_iscsi::server::{Limits, Server};
use pss_gateway::listen::Listener;
use pss_gateway::memory::{MemoryDevice, MemoryVolumes};

const SIZE_BYTES: u64 = 256 << 20;

fn target(name: &str, volume: &str, settings: LunSettings) -> (String, Arc<TargetEntry>) {
    let name = format!("iqn.2001-03.jp.tritech:{name}");
    let mut target = TargetEntry::new(&name);
    let disk = LunEntry {
        volume: volume.to_owned(),
        settings,
    };
    target.luns.insert(1, disk);
    if volume == "chap" {
        target.accounts.incoming.push(Account {
            name: "iscsi_pss".into(),
            secret: Secret::new("iscsi_pss000"),
        });
        target.accounts.outgoing = Some(Account {
            name: "target".into(),
            secret: Secret::new("target_secret00"),
        });
    }
    (name, Arc::new(target))
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    pss_gateway::program::start_log("info")?;
    let address = std::env::args().nth(1).unwrap_or("127.0.0.1:3260".into());
    let names = ["thin", "large-blocks", "removable", "read-only", "chap"];
    let devices = names.map(|name| MemoryDevice::new(name, SIZE_BYTES));
    let volumes = MemoryVolumes::new(devices);
    let default = LunSettings::default;
    let catalog = Catalog {
        targets: [
            target("thin", "thin", default()),
            target(
                "large-blocks",
                "large-blocks",
                LunSettings {
                    block_bytes: 4096,
                    ..default()
                },
            ),
            target(
                "removable",
                "removable",
                LunSettings {
                    removable: true,
                    sanitize: true,
                    physical_block_bytes: 512,
                    ..default()
                },
            ),
            target(
                "read-only",
                "read-only",
                LunSettings {
                    read_only: true,
                    ..default()
                },
            ),
            target("chap", "chap", default()),
        ]
        .into(),
        ..Catalog::default()
    };
    let server = Server::new(volumes, 1, Limits::default());
    for missing in server.apply(catalog).await {
        missing.log();
    }
    let listener = Listener::tcp(address.parse()?)?;
    server
        .run(vec![listener], pss_gateway::program::stop_signal()?)
        .await;
    Ok(())
}
