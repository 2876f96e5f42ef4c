//! The server's own limit: one stream, one object, nothing hashed on our side.

use std::{
    path::Path,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use sha2::{Digest as _, Sha256};

use crate::{Place, trees::Source};

/// Sends and fetches whole objects, signed, their payload not.
pub(crate) struct Raw {
    client: reqwest::Client,
    place: Place,
}

// === impl Raw ===

impl Raw {
    pub(crate) fn new(place: Place) -> Result<Self, String> {
        let client = reqwest::Client::builder().no_proxy().build().map_err(|error| error.to_string())?;
        Ok(Self { client, place })
    }

    /// PUTs one object; answers how long that took.
    pub(crate) async fn put(&self, key: &str, body: Bytes) -> Result<Duration, String> {
        let begun = Instant::now();
        let answer = self.request(reqwest::Method::PUT, key).body(body).send().await;
        let answer = answer.map_err(|error| error.to_string())?;
        let elapsed = begun.elapsed();
        if answer.status().is_success() {
            Ok(elapsed)
        } else {
            Err(format!("PUT {key}: {}", answer.status()))
        }
    }

    /// GETs one object and forgets it; answers how long that took, and its size.
    pub(crate) async fn get(&self, key: &str) -> Result<(Duration, usize), String> {
        let begun = Instant::now();
        let answer = self.request(reqwest::Method::GET, key).send().await;
        let mut answer = answer.map_err(|error| error.to_string())?;
        if !answer.status().is_success() {
            return Err(format!("GET {key}: {}", answer.status()));
        }
        let mut bytes = 0;
        while let Some(chunk) = answer.chunk().await.map_err(|error| error.to_string())? {
            bytes += chunk.len();
        }
        Ok((begun.elapsed(), bytes))
    }

    fn request(&self, method: reqwest::Method, key: &str) -> reqwest::RequestBuilder {
        const PAYLOAD: &str = "UNSIGNED-PAYLOAD";
        let Place { endpoint, bucket, access_key, secret_key, region } = &self.place;
        let host = endpoint.trim_start_matches("http://");
        let (date, time) = amz_date(SystemTime::now());
        let path = format!("/{bucket}/{key}");
        let headers = format!("host:{host}\nx-amz-content-sha256:{PAYLOAD}\nx-amz-date:{time}\n");
        let names = "host;x-amz-content-sha256;x-amz-date";
        let canonical = format!("{method}\n{path}\n\n{headers}\n{names}\n{PAYLOAD}");
        let scope = format!("{date}/{region}/s3/aws4_request");
        let to_sign =
            format!("AWS4-HMAC-SHA256\n{time}\n{scope}\n{}", hex::encode(Sha256::digest(canonical)));
        let mut signing = format!("AWS4{secret_key}").into_bytes();
        for part in [date.as_str(), region, "s3", "aws4_request", &to_sign] {
            signing = hmac(&signing, part.as_bytes());
        }
        let signature = hex::encode(signing);
        let authorization = format!(
            "AWS4-HMAC-SHA256 Credential={access_key}/{scope}, SignedHeaders={names}, Signature={signature}"
        );
        self.client
            .request(method, format!("{endpoint}{path}"))
            .header("x-amz-content-sha256", PAYLOAD)
            .header("x-amz-date", time)
            .header("authorization", authorization)
    }
}

/// Creates a tree from memory, ending in one sync of its file system.
pub(crate) fn create_files(source: &Source, root: &Path) -> Result<Duration, String> {
    let begun = Instant::now();
    source.write(root).map_err(|error| error.to_string())?;
    sync(root)?;
    Ok(begun.elapsed())
}

/// Writes everything of a directory's file system to the disk.
pub(crate) fn sync(root: &Path) -> Result<(), String> {
    let dir = std::fs::File::open(root).map_err(|error| format!("{}: {error}", root.display()))?;
    rustix::fs::syncfs(dir).map_err(|error| format!("{}: {error}", root.display()))
}

fn hmac(key: &[u8], text: &[u8]) -> Vec<u8> {
    let mut block = [0_u8; 64];
    if key.len() > block.len() {
        block[..32].copy_from_slice(&Sha256::digest(key));
    } else {
        block[..key.len()].copy_from_slice(key);
    }
    let inner = Sha256::new().chain_update(block.map(|byte| byte ^ 0x36)).chain_update(text).finalize();
    Sha256::new().chain_update(block.map(|byte| byte ^ 0x5c)).chain_update(inner).finalize().to_vec()
}

/// Writes a time as the date and the time of a signature, UTC.
fn amz_date(now: SystemTime) -> (String, String) {
    let seconds = now.duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs());
    let (days, of_day) = (seconds / 86_400, seconds % 86_400);
    // Days to a civil date, counting years from March (Howard Hinnant, "chrono-compatible low-level date algorithms").
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let date = format!("{year:04}{month:02}{day:02}");
    let time = format!("{date}T{:02}{:02}{:02}Z", of_day / 3_600, of_day / 60 % 60, of_day % 60);
    (date, time)
}
