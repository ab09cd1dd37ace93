//! The control socket, with initiators logged in.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::UnixStream;

use super::*;
use crate::auth::{Account, Secret};
use crate::config::{ConfigError, Loaded, Problem};
use crate::control::socket::{ControlSocket, SocketError};
use crate::control::{Configuration, Control, Load};

struct Steered {
    bench: Bench,
    path: PathBuf,
    _directory: TempDir,
}

impl Steered {
    async fn with(catalog: Catalog, load: Option<Load>) -> Steered {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("new/iscsi.sock");
        let bench = Bench::with(Limits::default(), catalog).await;
        let file = directory.path().join("targets.conf");
        std::fs::write(&file, "").unwrap();
        let configuration = load.map(|load| Configuration { file, load });
        let control = Control::new(Arc::clone(&bench.server), configuration, None);
        let socket = ControlSocket::bind(&path).unwrap();
        tokio::spawn(socket.serve(control));
        Steered {
            bench,
            path,
            _directory: directory,
        }
    }

    async fn new() -> Steered {
        Steered::with(catalog([entry(TARGET, "a")]), None).await
    }

    async fn connect(&self) -> BufReader<UnixStream> {
        BufReader::new(UnixStream::connect(&self.path).await.unwrap())
    }

    async fn ask(&self, request: Value) -> Value {
        answer(&mut self.connect().await, &request.to_string()).await
    }

    async fn done(&self, request: Value) -> Value {
        let answer = self.ask(request).await;
        assert!(answer.get("ok").is_some(), "{answer}");
        answer["ok"].clone()
    }

    async fn refused(&self, request: Value) -> (String, String) {
        let answer = self.ask(request).await;
        let text = |key: &str| answer["error"][key].as_str().unwrap_or_default().to_owned();
        (text("kind"), text("message"))
    }

    async fn edit(&self, change: Value) -> Value {
        self.done(json!({ "verb": "edit", "change": change })).await
    }
}

async fn answer(stream: &mut BufReader<UnixStream>, line: &str) -> Value {
    let line = format!("{line}\n");
    stream.write_all(line.as_bytes()).await.unwrap();
    read(stream).await
}

async fn read(stream: &mut BufReader<UnixStream>) -> Value {
    let mut line = String::new();
    let read = timeout(PATIENCE, stream.read_line(&mut line)).await;
    read.unwrap().unwrap_or_default();
    serde_json::from_str(&line).unwrap_or(Value::Null)
}

#[tokio::test]
async fn only_our_user_may_open_the_socket() {
    let steered = Steered::new().await;
    let metadata = std::fs::metadata(&steered.path).unwrap();
    assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
}

#[tokio::test]
async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let socket = ControlSocket::bind(&path).unwrap();
    let second = ControlSocket::bind(&path).unwrap_err();
    assert!(matches!(second, SocketError::InUse(_)));
    assert!(second.to_string().contains("--control PATH"), "{second}");
    drop(socket);
    assert!(!path.exists());
    std::fs::write(&path, "a file").unwrap();
    let error = ControlSocket::bind(&path).unwrap_err();
    assert!(matches!(error, SocketError::NotASocket(_)));
    assert_eq!(std::fs::read(&path).unwrap(), b"a file");
    let error = ControlSocket::bind(&path.join("below")).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("directory cannot be made"), "{text}");
}

#[tokio::test]
async fn requests_that_are_none_are_answered() {
    let steered = Steered::new().await;
    let mut stream = steered.connect().await;
    for wrong in ["", "{}", "hello", r#"{"verb":"dance"}"#] {
        let answer = answer(&mut stream, wrong).await;
        assert_eq!(answer["error"]["kind"], "usage", "{wrong}");
    }
    // It goes on.
    let answer = answer(&mut stream, r#"{"verb":"targets"}"#).await;
    assert!(answer["ok"].is_object());
    let mut long = steered.connect().await;
    long.write_all(&[b'x'; (64 << 10) + 1]).await.unwrap();
    assert_eq!(read(&mut long).await["error"]["kind"], "usage");
    assert_eq!(read(&mut long).await, Value::Null);
}

#[tokio::test]
async fn connections_to_the_socket_are_bounded() {
    let steered = Steered::new().await;
    let mut streams = Vec::new();
    for _ in 0..16 {
        let mut stream = steered.connect().await;
        let answer = answer(&mut stream, r#"{"verb":"sessions"}"#).await;
        assert!(answer["ok"].is_object());
        streams.push(stream);
    }
    let mut late = steered.connect().await;
    assert_eq!(read(&mut late).await["error"]["kind"], "busy");
    streams.clear();
    tokio::time::sleep(Duration::from_millis(50)).await;
    steered.done(json!({ "verb": "sessions" })).await;
}

#[tokio::test]
async fn sessions_are_seen_and_secrets_are_not() {
    let steered = Steered::new().await;
    let mut client = steered.bench.client("").await;
    client.ready().await;
    let targets = steered.done(json!({ "verb": "targets" })).await;
    let target = &targets["targets"][0];
    assert_eq!(target["tid"], 1);
    assert_eq!(target["state"], "ready");
    assert_eq!(target["sessions"], 1);
    assert_eq!(target["luns"][0]["size_bytes"], 64 << 20);
    let sessions = steered.done(json!({ "verb": "sessions" })).await;
    let session = &sessions["sessions"][0];
    assert_eq!(session["session"], client.tsih);
    assert_eq!(session["isid"], "800000000001");
    assert_eq!(session["target"], TARGET);
    assert!(session["idle_ms"].as_u64().unwrap() < 10_000);
    assert!(session["received_bytes"].as_u64().unwrap() > 0);
    let connections = steered.done(json!({ "verb": "connections" })).await;
    let connection = &connections["connections"][0];
    let local = client.stream.local_addr().unwrap().to_string();
    assert_eq!(connection["address"], local);
    assert_eq!(connection["cid"], 0);
    let account = json!({ "edit": "new-account", "user": "u", "password": "hunter2hunter2" });
    steered.edit(account).await;
    let bind = json!({ "edit": "bind-account", "target": TARGET, "user": "u" });
    steered.edit(bind).await;
    for verb in ["targets", "accounts"] {
        let said = steered.done(json!({ "verb": verb })).await.to_string();
        assert!(said.contains("\"u\""), "{said}");
        assert!(!said.contains("hunter2"), "{said}");
    }
    // It holds for those who come from now on.
    client.ping().await;
    let mut other = Client::connect(steered.bench.address).await;
    assert_ne!(other.try_login("").await, 0);
}

#[tokio::test]
async fn kick_is_answered_when_the_session_is_gone() {
    let steered = Steered::new().await;
    let mut client = steered.bench.client("").await;
    client.ready().await;
    let kick = json!({ "verb": "kick", "session": client.tsih, "within_s": 0 });
    let answer = steered.done(kick.clone()).await;
    assert_eq!(answer["ended"], true);
    let sessions = steered.done(json!({ "verb": "sessions" })).await;
    assert_eq!(sessions["sessions"], json!([]));
    let (kind, message) = steered.refused(kick).await;
    assert_eq!(kind, "not-found");
    assert_eq!(message, format!("there is no session {}", client.tsih));
    let long = json!({ "verb": "kick", "session": 1, "within_s": 601 });
    assert_eq!(steered.refused(long).await.0, "usage");
}

#[tokio::test]
async fn a_drained_target_takes_no_sessions_until_it_is_undrained() {
    let other = "iqn.2001-03.jp.tritech:b";
    let both = catalog([entry(TARGET, "a"), entry(other, "b")]);
    let steered = Steered::with(both, None).await;
    let mut goes = steered.bench.client("").await;
    goes.ready().await;
    let mut stays = steered.bench.client(&format!("TargetName={other}")).await;
    stays.ready().await;
    let drain = json!({ "verb": "drain", "target": 1, "within_s": 0 });
    let answer = steered.done(drain).await;
    assert_eq!(answer["asked"], 1);
    assert_eq!(answer["left"], 0);
    stays.ping().await;
    let mut late = Client::connect(steered.bench.address).await;
    assert_ne!(late.try_login("").await, 0);
    let undrain = json!({ "verb": "undrain", "target": TARGET });
    steered.done(undrain).await;
    steered.bench.client("").await.ready().await;
    let unknown = json!({ "verb": "drain", "target": "iqn.x" });
    assert_eq!(steered.refused(unknown).await.0, "not-found");
}

#[tokio::test]
async fn targets_are_made_while_running() {
    let steered = Steered::new().await;
    let new = "iqn.2001-03.jp.tritech:new";
    let edit = |force: bool, change: Value| json!({ "verb": "edit", "tid": 9, "force": force, "change": change });
    let make = |name: &str| edit(false, json!({ "edit": "new-target", "target": name }));
    steered.done(make(new)).await;
    assert_eq!(steered.refused(make(new)).await.0, "exists");
    let taken = make("iqn.2001-03.jp.tritech:other");
    assert_eq!(steered.refused(taken).await.0, "exists");
    let lun = |volume: &str| {
        let change = json!({ "edit": "new-lun", "target": "", "lun": 1, "volume": volume });
        edit(false, change)
    };
    assert_eq!(steered.refused(lun("nothing")).await.0, "not-found");
    steered.done(lun("b")).await;
    // Nobody was bound to it.
    let name = format!("TargetName={new}");
    let mut early = Client::connect(steered.bench.address).await;
    assert_ne!(early.try_login(&name).await, 0);
    let bind = json!({ "edit": "bind-address", "target": new, "address": "ALL" });
    steered.edit(bind).await;
    let mut client = steered.bench.client(&name).await;
    client.ready().await;
    let read_only = |force| {
        let options = json!([["readonly", "1"]]);
        edit(
            force,
            json!({ "edit": "update-lun", "target": "", "lun": 1, "options": options }),
        )
    };
    assert_eq!(steered.refused(read_only(false)).await.0, "busy");
    steered.done(read_only(true)).await;
    let delete = |force| edit(force, json!({ "edit": "delete-target", "target": "" }));
    let (kind, message) = steered.refused(delete(false)).await;
    assert_eq!(kind, "busy");
    assert!(message.contains("a session uses"), "{message}");
    steered.done(delete(true)).await;
    assert_eq!(steered.refused(delete(true)).await.0, "not-found");
}

#[tokio::test]
async fn reload_reads_again_and_a_wrong_file_changes_nothing() {
    let steered = Steered::new().await;
    let reload = || json!({ "verb": "reload" });
    assert_eq!(steered.refused(reload()).await.0, "unsupported");
    let wrong = Arc::new(AtomicBool::new(false));
    let is_wrong = Arc::clone(&wrong);
    let problem = || Problem {
        file: "f".into(),
        line: 3,
        is_warning: false,
        text: "nonsense".into(),
    };
    let other = "iqn.2001-03.jp.tritech:b";
    let load: Load = Box::new(move || match is_wrong.load(Ordering::Relaxed) {
        true => Err(ConfigError(vec![problem()])),
        false => Ok(Loaded {
            catalog: catalog([entry(TARGET, "a"), entry(other, "gone")]),
            warnings: Vec::new(),
        }),
    });
    let steered = Steered::with(catalog([entry(TARGET, "a")]), Some(load)).await;
    let mut client = steered.bench.client("").await;
    client.ready().await;
    let answer = steered.done(reload()).await;
    assert_eq!(answer["changed"], json!([other]));
    let missing = answer["missing"][0].as_str().unwrap();
    assert!(missing.contains("gone"), "{missing}");
    client.ping().await;
    wrong.store(true, Ordering::Relaxed);
    let (kind, message) = steered.refused(reload()).await;
    assert_eq!(kind, "usage");
    assert!(message.contains("f:3: nonsense"), "{message}");
    assert_eq!(steered.bench.server.catalog().targets.len(), 2);
}

/// A configuration that is what was put into the cell.
fn changeable(catalog: &Catalog) -> (Arc<Mutex<Catalog>>, Load) {
    let cell = Arc::new(Mutex::new(catalog.clone()));
    let read = Arc::clone(&cell);
    let load: Load = Box::new(move || {
        Ok(Loaded {
            catalog: read.lock().unwrap().clone(),
            warnings: Vec::new(),
        })
    });
    (cell, load)
}

#[tokio::test]
async fn reload_ends_sessions_whose_right_is_gone_and_no_others() {
    let other = "iqn.2001-03.jp.tritech:b";
    let first = catalog([entry(TARGET, "a"), entry(other, "b")]);
    let (configured, load) = changeable(&first);
    let steered = Steered::with(first.clone(), Some(load)).await;
    let mut goes = steered.bench.client("").await;
    goes.ready().await;
    let mut stays = steered.bench.client(&format!("TargetName={other}")).await;
    stays.ready().await;
    let mut next = first.clone();
    let closed = Arc::make_mut(next.targets.get_mut(TARGET).unwrap());
    closed.initiators = vec!["iqn.2001-03.com.example:someone".to_owned()];
    let guarded = Arc::make_mut(next.targets.get_mut(other).unwrap());
    guarded.accounts.incoming = vec![Account {
        name: "u".to_owned(),
        secret: Secret::new("hunter2hunter2"),
    }];
    *configured.lock().unwrap() = next;
    let answer = steered.done(json!({ "verb": "reload" })).await;
    let text = answer["ended"][0].as_str().unwrap();
    let named = format!("session {} of ", goes.tsih);
    assert!(text.starts_with(&named), "{text}");
    assert!(text.ends_with("initiator-name does not admit it"), "{text}");
    assert_eq!(answer["ended"].as_array().unwrap().len(), 1);
    let text = answer["warnings"][0].as_str().unwrap();
    assert!(text.contains("CHAP is required"), "{text}");
    assert!(text.ends_with("holds from its next login"), "{text}");
    // Asked to log out (RFC 7143 §11.9.1), and gone after it did.
    let event = goes.receive().await.unwrap();
    assert_eq!(opcode_of(&event.bhs), opcode::ASYNC_MESSAGE);
    assert_eq!(event.bhs[36], 1);
    goes.log_out().await;
    assert!(goes.is_closed().await);
    stays.ping().await;
    let sessions = steered.done(json!({ "verb": "sessions" })).await;
    assert_eq!(sessions["sessions"].as_array().unwrap().len(), 1);
    assert_eq!(sessions["sessions"][0]["session"], stays.tsih);
    let mut late = Client::connect(steered.bench.address).await;
    assert_ne!(late.try_login("").await, 0);
}

#[tokio::test]
async fn a_change_that_shuts_a_session_out_says_so_once_and_lets_it_go_on() {
    let steered = Steered::new().await;
    let mut client = steered.bench.client("").await;
    client.ready().await;
    let bind =
        json!({ "edit": "bind-name", "target": TARGET, "initiator": "iqn.2001-03.com.example:z" });
    let answer = steered.edit(bind).await;
    let text = answer["warnings"][0].as_str().unwrap();
    let remedy = format!("pss iscsi kick {}", client.tsih);
    assert!(text.ends_with(&remedy), "{text}");
    let bind =
        json!({ "edit": "bind-name", "target": TARGET, "initiator": "iqn.2001-03.com.example:y" });
    assert_eq!(steered.edit(bind).await["warnings"], json!([]));
    client.ping().await;
}

#[tokio::test]
async fn another_file_than_the_servers_is_refused() {
    let first = catalog([entry(TARGET, "a")]);
    let (_, load) = changeable(&first);
    let steered = Steered::with(first, Some(load)).await;
    let directory = steered._directory.path();
    let reload = |file: PathBuf| json!({ "verb": "reload", "file": file });
    std::os::unix::fs::symlink("targets.conf", directory.join("link")).unwrap();
    steered.done(reload(directory.join("targets.conf"))).await;
    steered.done(reload(directory.join("link"))).await;
    std::fs::write(directory.join("other"), "").unwrap();
    for other in ["other", "nothing"] {
        let (kind, message) = steered.refused(reload(directory.join(other))).await;
        assert_eq!(kind, "usage");
        assert!(message.contains("targets.conf"), "{message}");
    }
}

#[tokio::test]
async fn who_logs_in_while_the_rules_change_meets_the_new_ones() {
    let bench = Bench::new().await;
    let mut client = Client::connect(bench.address).await;
    let mut text = Vec::new();
    put(&mut text, "InitiatorName", "iqn.1994-05.com.redhat:me");
    put(&mut text, "TargetName", TARGET);
    client.send(&client.login_request(0x04), &text).await;
    let pdu = client.receive().await.unwrap();
    assert_eq!((pdu.bhs[36], pdu.bhs[37]), (0, 0));
    let mut closed = entry(TARGET, "a");
    closed.initiators = vec!["iqn.2001-03.com.example:someone".to_owned()];
    bench.server.apply(catalog([closed])).await;
    client.send(&client.login_request(0x87), b"").await;
    let pdu = client.receive().await.unwrap();
    assert_eq!((pdu.bhs[36], pdu.bhs[37]), (2, 2));
    assert!(client.is_closed().await);
    assert!(bench.server.sessions().all().is_empty());
}
