//! A teacher behind TLS and HTTP/2 with compressed responses, and a certificate that is not trusted.

use std::io::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use rustls::ServerConfig;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use crate::fixture::{CommandOutput, Run};
use crate::served::{KEY, run_at};

/// A server that accepts only HTTP/2 over TLS, with a self-signed certificate for 127.0.0.1.
struct Secure {
    port: u16,
    /// The certificate in PEM.
    certificate: String,
    requests: Arc<AtomicU64>,
    /// `accept-encoding` and `authorization` of each request.
    headers: Arc<Mutex<Vec<(String, String)>>>,
    _runtime: tokio::runtime::Runtime,
}

impl Secure {
    fn start() -> Secure {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let own = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(own.signing_key.serialize_der()));
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![own.cert.der().clone()], key)
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let server = Secure {
            port: listener.local_addr().unwrap().port(),
            certificate: own.cert.pem(),
            requests: Arc::default(),
            headers: Arc::default(),
            _runtime: runtime,
        };
        let (requests, headers) = (server.requests.clone(), server.headers.clone());
        let acceptor = TlsAcceptor::from(Arc::new(config));
        server._runtime.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (acceptor, requests, headers) =
                    (acceptor.clone(), requests.clone(), headers.clone());
                tokio::spawn(serve(stream, acceptor, requests, headers));
            }
        });
        server
    }

    /// Builds a run with this server as the teacher, which trusts `certificate`.
    fn run(&self, certificate: &str) -> Run {
        let run = run_at(&format!("https://127.0.0.1:{}/v1", self.port), "");
        run.write("roots.pem", certificate);
        run
    }
}

fn potstill(run: &Run, arguments: &[&str]) -> CommandOutput {
    let mut command = run.command(arguments);
    command
        .env("TEST_KEY", KEY)
        .env("SSL_CERT_FILE", run.path("roots.pem"))
        .env_remove("SSL_CERT_DIR");
    run.output(&mut command)
}

async fn serve(
    stream: TcpStream,
    acceptor: TlsAcceptor,
    requests: Arc<AtomicU64>,
    headers: Arc<Mutex<Vec<(String, String)>>>,
) {
    let Ok(stream) = acceptor.accept(stream).await else {
        return;
    };
    let mut connection = h2::server::handshake(stream).await.unwrap();
    while let Some(Ok((request, mut reply))) = connection.accept().await {
        let number = requests.fetch_add(1, Ordering::SeqCst);
        let header = |name| {
            let value = request.headers().get(name);
            value.map_or_else(String::new, |v| v.to_str().unwrap().to_owned())
        };
        let seen = (header("accept-encoding"), header("authorization"));
        headers.lock().unwrap().push(seen);
        tokio::spawn(async move {
            let mut body = request.into_body();
            while let Some(part) = body.data().await {
                let read = part.unwrap().len();
                body.flow_control().release_capacity(read).unwrap();
            }
            let (encoding, bytes) = answer(number);
            let head = http::Response::builder()
                .header("content-type", "application/json")
                .header("content-encoding", encoding)
                .body(())
                .unwrap();
            let mut send = reply.send_response(head, false).unwrap();
            send.send_data(Bytes::from(bytes), true).unwrap();
        });
    }
}

/// Returns a response that is compressed with gzip, with zstd or not at all, in turn.
fn answer(number: u64) -> (&'static str, Vec<u8>) {
    let text = json!({
        "id": "1", "object": "chat.completion", "created": 1, "model": "m",
        "choices": [{ "index": 0, "finish_reason": "stop",
                      "message": { "role": "assistant", "content": "compressed or not" } }],
        "usage": { "prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7 },
    })
    .to_string();
    match number % 3 {
        0 => {
            let mut gzip =
                flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
            gzip.write_all(text.as_bytes()).unwrap();
            ("gzip", gzip.finish().unwrap())
        }
        1 => ("zstd", zstd::encode_all(text.as_bytes(), 3).unwrap()),
        _ => ("identity", text.into_bytes()),
    }
}

#[test]
fn compressed_answers_arrive_over_tls_and_http2() {
    let server = Secure::start();
    let run = server.run(&server.certificate);
    assert_eq!(potstill(&run, &["import", "run.toml"]).code, 0);
    let collected = potstill(&run, &["collect", "run.toml"]);
    assert_eq!(collected.code, 0, "{}", collected.stderr);
    assert_eq!(server.requests.load(Ordering::SeqCst), 12);
    let shard = run.path("runs/tiny/completions/shard-00000.parquet");
    let answers = potstill::datasets::read_shard::<potstill::datasets::Completion>(&shard);
    let answers: Vec<_> = answers.unwrap().map(Result::unwrap).collect();
    assert_eq!(answers.len(), 12);
    assert!(answers.iter().all(|a| a.answer == "compressed or not"));
    for (encodings, key) in server.headers.lock().unwrap().iter() {
        assert!(
            encodings.contains("gzip") && encodings.contains("zstd"),
            "{encodings}"
        );
        assert_eq!(*key, format!("Bearer {KEY}"));
    }
}

#[test]
fn an_untrusted_certificate_gets_no_request() {
    let server = Secure::start();
    let run = server.run(&Secure::start().certificate);
    assert_eq!(potstill(&run, &["import", "run.toml"]).code, 0);
    let collected = potstill(&run, &["collect", "run.toml"]);
    assert_eq!(collected.code, 1, "{}", collected.stderr);
    assert!(
        collected.stderr.contains("certificate"),
        "{}",
        collected.stderr
    );
    assert!(!collected.stderr.contains(KEY));
    assert_eq!(server.requests.load(Ordering::SeqCst), 0);
}
